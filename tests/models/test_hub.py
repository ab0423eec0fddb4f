"""Models of the hub: from a cache that the test lays out, and one sentence for what is neither there nor in reach."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, hf_model
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ctlens.core.errors import CtlensError
from ctlens.models import hub
from ctlens.models.export import export_peft
from ctlens.models.loading import load_model, load_tokenizer
from ctlens.models.lora import LoRA, add_adapters, has_adapters
from ctlens.models.parameters import present_parameters

pytestmark = pytest.mark.boundary

NAME = "some-org/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
TOKENS = torch.arange(20).reshape(2, 10)


def lay_out(cache: Path, name: str, ref: str, folder: Path) -> None:
    """Puts a folder into a cache as the hub does: content in blobs, names in a snapshot, the commit in refs."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMITS[ref]
    for made in (place / "refs", place / "blobs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(COMMITS[ref])
    for file in folder.iterdir():
        blob = place / "blobs" / f"{ref}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two versions of a tiny Llama."""
    for seed, ref in enumerate(COMMITS):
        hf_model("llama", seed=seed).save_pretrained(tmp_path / ref)
        byte_level_tokenizer().save_pretrained(tmp_path / ref)
        lay_out(tmp_path / "cache", NAME, ref, tmp_path / ref)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def refusal(source: str | Path, revision: str | None = None) -> str:
    with pytest.raises(CtlensError) as error:
        load_model(source, revision=revision)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_a_cached_model_loads_by_its_name_and_each_of_its_revisions(cache: Path) -> None:
    for revision, seed in ((None, 0), ("main", 0), ("v1", 1), (COMMITS["v1"], 1)):
        model = load_model(NAME, revision=revision)
        assert (model(TOKENS) - hf_model("llama", seed=seed)(TOKENS).logits).abs().max() < 1e-5
        assert model.tokenizer("a creature") == byte_level_tokenizer()("a creature")
    assert load_tokenizer(NAME).get_vocab() == byte_level_tokenizer().get_vocab()


def test_the_command_line_takes_a_name(cache: Path, tmp_path: Path, call: Call) -> None:
    ended = call(f"export --model {NAME} --out {tmp_path / 'out'}")
    assert ended.code == 0
    assert torch.equal(load_model(tmp_path / "out")(TOKENS), load_model(NAME)(TOKENS))


def test_a_folder_comes_before_a_model_of_the_hub_and_a_path_names_none(cache: Path, tmp_path: Path) -> None:
    hf_model("gpt2").save_pretrained(tmp_path / NAME)
    assert next(iter(present_parameters(load_model(NAME)))).startswith("transformer.")
    assert "has no revision v1" in refusal(NAME, "v1")
    shutil.rmtree(tmp_path / NAME)
    assert "is no model folder" in refusal(Path(NAME))


def test_an_adapter_names_its_base_by_the_name_on_the_hub(cache: Path, tmp_path: Path) -> None:
    model = load_model(NAME)
    add_adapters(model, LoRA(2))
    export_peft(model, tmp_path / "adapter")
    lay_out(cache, "some-org/adapter", "main", tmp_path / "adapter")

    again = load_model("some-org/adapter")

    assert has_adapters(again) and torch.equal(again(TOKENS), model(TOKENS))


def test_what_is_not_cached_is_one_sentence_offline(cache: Path, call: Call) -> None:
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refusal("gpt2") and str(cache) in refusal("gpt2")
    assert f"no whole model of that name at revision v2, and {hub._unreached()}" in refusal(NAME, "v2")
    next((cache / "models--some-org--tiny" / "snapshots" / COMMITS["v1"]).glob("*.safetensors")).unlink()
    assert "holds no weights as safetensors" in refusal(NAME, "v1")
    for text in ("a--b", "one/two/three", "/no/where", "..x/..", "some org"):
        assert "is no model folder: name one" in refusal(text)

    ended = call("evaluate --model some-org/other --n-prompts 2")

    assert ended.code == 2 and ended.out == "" and ended.err.count("\n") == 1 and "hf download" in ended.err


def test_what_is_not_cached_is_one_sentence_where_the_hub_does_not_answer(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the port at which nobody answers
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its tries
    huggingface_hub.close_session()
    try:
        assert "the hub cannot be reached" in refusal("gpt2")
        assert load_model(NAME, revision=COMMITS["v1"])
    finally:
        huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (RevisionNotFoundError, "has no revision v2"),
        (RepositoryNotFoundError, "shows no model of that name"),
        (GatedRepoError, "accept them and run `hf auth login`"),
        (OSError, "cannot be fetched from the hub: what it says. "),
    ],
)
def test_what_the_hub_refuses_is_said_with_what_to_do(
    kind: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: object, **options: object) -> str:
        raise kind.__new__(kind) if kind is not OSError else OSError("what it says.\nAnd more.")

    monkeypatch.setattr(hub, "snapshot_download", refused)
    assert words in refusal(NAME, "v2")
