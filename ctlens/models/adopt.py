"""Adoption: a TransformerLens model, whoever made it, becomes one that ctlens trains, reads, saves and exports.

Adoption looks at a model once. It refuses weights that are not raw, marks the parameters that only the bridge has, and
tries which hooks of a bridge are not what their names say, by identities that the names promise (see `tried_hooks`).
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ctlens.core.errors import CtlensError
from ctlens.core.types import Activations, HookFunction, LensModel, Tokens
from ctlens.models.bridges import huggingface_config, is_bridge, unwire
from ctlens.models.classes import show_sizes
from ctlens.models.hooks import SHORTHANDS, hooked, run
from ctlens.models.parameters import evaluating, plain_name, without
from ctlens.models.parity import lens_answers, narrowed, original_answers, probe_prompts, require_parity
from ctlens.models.twins import huggingface_twin

NATIVE = "TransformerLensNative"
KNOWN_CLASSES = ("HookedTransformer", "TransformerBridge")
_SPLIT_COPIES = (".qkv.", ".gate_up_proj.weight")
"""Fused projections that a bridge keeps and does not compute with: it has split them."""
_FOLDED = ("LNPre", "RMSPre")
_STREAM_SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_PROBE_TOKENS = 6


def adopt(model: LensModel) -> LensModel:
    """Makes a TransformerLens model one that can be trained, saved, loaded and exported, or says why it cannot.

    `load_model` calls this, and so does everything that takes a model. The model itself is returned; it is marked, and
    parameters that the architecture does not have, as the unembedding bias that TransformerLens 3.x adds, are frozen.

    >>> import ctlens as ct
    >>> model = ct.load_organism()
    >>> ct.adopt(model) is model
    True

    Args:
        model: a `HookedTransformer` or a `TransformerBridge`, from ctlens or from TransformerLens itself.

    Raises:
        CtlensError: the object is no such model; it is a bridge that computes something else than HuggingFace's model
            of its configuration and weights, which is made once to compare; its weights are folded, centred or
            otherwise processed, so that its activations are not those of the weights that were trained; it computes
            NaN; or it could not be built again from a folder.
    """
    brought = not hasattr(model, "ctlens_absent")
    marked(model)
    if brought and huggingface_config(model) is not None:
        try:
            _require_twin(model)
        except CtlensError:
            del cast(Any, model).ctlens_absent  # it is asked again at the next use
            raise
    return model


def marked(model: LensModel) -> LensModel:
    """Does for a model what `adopt` does, without comparing a bridge's logits with HuggingFace's; raises as it does."""
    unseen = not hasattr(model, "ctlens_absent")
    if unseen:
        _require_lens(model)
    _require_unprocessed(model)
    if unseen:
        _require_uncentred(model)
        absent = bridge_only(model)
        if is_bridge(model):  # the names were made for a HookedTransformer
            cast(Any, model).ctlens_trial = tried_hooks(model)
        show_sizes(model)
        model.cfg.n_ctx = min(model.cfg.n_ctx, _steady_context(huggingface_config(model)))
        without(model, absent)  # last, because this marks the model: one that was refused is looked at again
    return model


def _require_twin(model: LensModel) -> None:
    """Refuses a bridge that computes something else than a HuggingFace model with its configuration and weights.

    The model that the bridge was made of is no judge: the bridge has put its own modules into it.

    Raises:
        CtlensError: logits differ by more than rounding, or no such model could be made.
    """
    kind = type(cast(Any, model).original_model).__name__
    try:
        twin = huggingface_twin(model)
    except CtlensError as error:
        raise CtlensError(
            f"this bridge to {kind} cannot be compared with HuggingFace's ({error}): load the model with "
            "ctlens.load_model, which compares them before it makes the bridge."
        ) from None
    prompts = probe_prompts(twin.config)
    with evaluating(model), narrowed(twin.config, huggingface_config(model)):
        require_parity(kind, lens_answers(model, prompts), original_answers(twin, prompts))


def _require_lens(model: Any) -> None:
    kind = type(model).__name__
    if isinstance(model, nn.Module) and not isinstance(model, LensModel):
        raise CtlensError(f"{kind} is no TransformerLens model: pass it to ctlens.load_model first.")
    if not isinstance(model, nn.Module):
        raise CtlensError(f"a model is needed, and this is {model!r:.60}: load one with ctlens.load_model.")
    lens = cast(Any, model)
    built_anew = kind in KNOWN_CLASSES and (
        not is_bridge(lens) or huggingface_config(lens) is not None or lens.cfg.architecture == NATIVE
    )
    if not built_anew:
        raise CtlensError(
            f"{kind} is a class of its own, which no folder could be loaded into again: give a HookedTransformer or a "
            "TransformerBridge."
        )


def _require_unprocessed(model: LensModel) -> None:
    """Refuses weights that TransformerLens has processed; cheap, because it is asked at every use."""
    folded = model.cfg.normalization_type in _FOLDED
    if folded or getattr(model, "compatibility_mode", False) or getattr(model, "_weights_processed", False):
        what = "norms are folded into the weights behind them" if folded else "weights are in compatibility mode"
        raise CtlensError(
            f"the model's {what}, so its activations are not those of the weights that were trained: load it raw, with "
            "from_pretrained_no_processing, or as a bridge without enable_compatibility_mode."
        )


@torch.no_grad()
def _require_uncentred(model: LensModel) -> None:
    """Refuses a `HookedTransformer` whose weights that write into the stream are centred, each with a mean of zero."""
    if is_bridge(model) or model.cfg.normalization_type != "LN":
        return
    lens = cast(Any, model)
    writing = [lens.embed.W_E, *(block.attn.W_O for block in lens.blocks)]
    if all(map(_centred, writing)):
        raise CtlensError(
            "the model's weights are centred, so its residual stream is not that of the weights that were trained: "
            "load it raw, with center_writing_weights=False."
        )


def _centred(weight: Tensor) -> bool:
    """Whether the mean over `d_model` is zero up to rounding; by chance it is about the deviation over its root."""
    chance = weight.float().std() / weight.shape[-1] ** 0.5
    mean = weight.float().mean(-1).square().mean().sqrt()
    return bool(mean <= 4 * torch.finfo(weight.dtype).eps * chance and chance > 0)


def bridge_only(model: LensModel) -> list[str]:
    """The parameters of a bridge to HuggingFace that the architecture does not have.

    Raises:
        CtlensError: one of them was trained, so that no HuggingFace model computes what this one computes.
    """
    if huggingface_config(model) is None:
        return []
    lens = cast(Any, model)
    added = getattr(lens.unembed.original_component, "bias", None)
    if not isinstance(added, nn.Parameter) or _unembeds_with_bias(lens.original_model):
        added = None  # 4.x adds a buffer
    elif not added.is_meta and added.any():  # on the meta device there are no numbers to look at
        raise CtlensError(
            f"the model's unembedding has a bias, which {type(lens.original_model).__name__} has not: set it to zero, "
            "or the model could not be saved."
        )
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return [
        name
        for name, parameter in parameters.items()
        if parameter is added or any(part in name for part in _SPLIT_COPIES)
    ]


def _unembeds_with_bias(hf: Any) -> bool:
    """Asks the class of a HuggingFace model, because a bridge changes the model itself."""
    with torch.device("meta"):
        bare = type(hf)(copy.deepcopy(hf.config))
    return getattr(bare.get_output_embeddings(), "bias", None) is not None


def _steady_context(config: Any) -> int:
    """The longest sequence, in tokens, whose rotary factors do not depend on its length, which is taken as the context.

    Longrope (Phi-3's) has two sets of factors. Longer sequences take the second at every token, and so does all that
    is batched with them: keys in a cache would be of the first set, and a pair's numbers of its batch-mates.
    """
    rope = {} if config is None else getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict) and kind.get("rope_type") == "longrope"]
    switches = [kind["original_max_position_embeddings"] for kind in kinds]
    if not switches:
        return sys.maxsize
    warnings.warn(
        f"the context is taken as {min(switches)} tokens: the model's rotary factors switch beyond (longrope).",
        stacklevel=2,
    )
    return min(switches)


class Trial(NamedTuple):
    """What a trial found out about the hooks of a model, each by its full name with the reason.

    Attributes:
        odd: hooks that are not what their names say.
        read_only: hooks whose activation is right, and whose edit reaches nothing.
    """

    odd: dict[str, str]
    read_only: dict[str, str]


class _Write(NamedTuple):
    """What a matrix of a block reads and what it writes into the stream, `[token, _]` each."""

    read: Tensor
    written: Tensor


class _Pass(NamedTuple):
    """A forward pass: its activations by hook name, and what the matrices of each block read and wrote."""

    found: Activations
    writes: list[list[_Write]]


@torch.no_grad()
def tried_hooks(model: LensModel) -> Trial:
    """Tries the hooks of a bridge by what their names promise, in every block and up to rounding.

    - `resid_mid` is `resid_pre + attn_out`, and `resid_post` is `resid_mid + mlp_out`; where attention and MLP stand
      side by side, `resid_post` is `resid_pre + attn_out + mlp_out`.
    - A matrix reads `mlp_post`, and a matrix reads all heads of `z`, of which there are as many as the attention has.
    - `attn_out` and `mlp_out` are what such a matrix writes, or what the stream gains.
    - Without any attention in `pattern`, `z` is zero, and with zeros in `mlp_post` its matrix reads zeros.

    Where every expert has a hidden layer of its own, heads are of another width, or a norm stands on the stream itself,
    some do not hold. The model is run twice on a few tokens.

    Raises:
        NotFinite: the model computes NaN or infinity.
    """
    width = min(_PROBE_TOKENS, model.cfg.n_ctx)
    tokens = torch.arange(2 * width, device=next(model.parameters()).device).reshape(2, width) % model.cfg.d_vocab
    with evaluating(model):
        plain = _passed(model, tokens)
        zeroed = _passed(model, tokens, zero=("pattern", "mlp_post"))
    unwire(model)
    odd: dict[str, str] = {}
    read_only: dict[str, str] = {}
    for layer, (of_block, with_zeros) in enumerate(zip(plain.writes, zeroed.writes, strict=True)):
        names = {site: name.format(layer=layer) for site, name in SHORTHANDS.items()}
        seen = {site: plain.found[name] for site, name in names.items() if name in plain.found}
        found = {**_odd_matrices(seen, of_block, model.cfg.n_heads), **_odd_stream(seen, of_block, tokens, model.cfg)}
        odd |= {names[site]: reason for site, reason in found.items()}
        if "pattern" in seen and "z" in seen and zeroed.found[names["z"]].any():
            read_only[names["pattern"]] = "the heads go on with the attention they had"
        reader = _reader(seen["mlp_post"], of_block) if "mlp_post" in seen else None
        if reader is not None and with_zeros[reader].read.any():
            read_only[names["mlp_post"]] = "the MLP goes on with the numbers it had"
    return Trial(odd, read_only)


def _passed(model: LensModel, tokens: Tokens, zero: Collection[str] = ()) -> _Pass:
    """Runs a model, with zeros in place of the activations at some sites."""
    known = model.hook_dict
    found: Activations = {}
    writes: list[list[_Write]] = []
    hooks: list[tuple[Any, HookFunction]] = []
    for layer, site in product(range(model.cfg.n_layers), SHORTHANDS):
        name = SHORTHANDS[site].format(layer=layer)
        if name in known:
            hooks.append((known[name], partial(_keep, found, name, site in zero)))
    with hooked(model, hooks), ExitStack() as handles, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 4.x says that an edit is lost, which is what is tried
        for block in cast(Any, model).blocks:
            writes.append([])
            for module in block.modules():
                if isinstance(module, nn.Linear | Conv1D):
                    note = partial(_note, writes[-1], model.cfg.d_model)
                    handles.callback(module.register_forward_hook(note).remove)
        run(model, tokens)
    return _Pass(found, writes)


def _keep(found: Activations, name: str, zero: bool, activation: Tensor, hook: Any) -> Tensor | None:
    found[name] = activation
    return torch.zeros_like(activation) if zero else None


def _note(writes: list[_Write], d_model: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if inputs and output.shape[-1] == d_model:
        writes.append(_Write(inputs[0].flatten(0, -2), output.flatten(0, -2)))


def _odd_matrices(seen: Mapping[str, Tensor], writes: list[_Write], n_heads: int) -> dict[str, str]:
    """What is odd about the activations that a matrix is to read."""
    odd = {}
    if "mlp_post" in seen and _reader(seen["mlp_post"], writes) is None:
        odd["mlp_post"] = "no one matrix reads it, as where several experts share the work; name mlp_out"
    if "z" in seen and seen["z"].ndim != 4:
        odd["z"] = "it is not split into heads; name attn_out"
    elif "z" in seen and seen["z"].shape[2] != n_heads:
        odd["z"] = (
            f"it is split into {seen['z'].shape[2]} heads where the attention has {n_heads}, as heads of latent "
            "attention are of another width; name attn_out or pattern"
        )
    elif "z" in seen and _reader(seen["z"].flatten(2), writes) is None:
        odd["z"] = "no one matrix reads it, because something changes the heads first; name attn_out or pattern"
    return odd


def _odd_stream(seen: Mapping[str, Tensor], writes: list[_Write], tokens: Tokens, cfg: Any) -> dict[str, str]:
    """What is odd about the activations that make up the stream."""
    shape = (*tokens.shape, cfg.d_model)
    odd = {
        site: f"it has the shape {tuple(seen[site].shape)} and not one vector of {cfg.d_model} numbers per token; name "
        "another hook point"
        for site in _STREAM_SITES
        if site in seen and seen[site].shape != shape
    }
    if odd or not {"resid_pre", "resid_post", "attn_out", "mlp_out"} <= seen.keys():
        return odd
    if "resid_mid" in seen:
        gains_attention = _is_sum(seen["resid_mid"], seen["resid_pre"], seen["attn_out"])
        gains_mlp = _is_sum(seen["resid_post"], seen["resid_mid"], seen["mlp_out"])
    else:
        gains_attention = _is_sum(seen["resid_post"], seen["resid_pre"], seen["attn_out"], seen["mlp_out"])
        gains_mlp = gains_attention
    if "resid_mid" in seen and not gains_attention:
        odd["resid_mid"] = (
            "it is not resid_pre + attn_out, because the blocks norm or scale the stream itself; name resid_pre, "
            "resid_post or attn_out"
        )
    for site, gained in (("attn_out", gains_attention), ("mlp_out", gains_mlp)):
        written = (write.written for write in writes)
        if not gained and not any(_same(seen[site].flatten(0, 1), each) for each in written):
            odd[site] = "it is neither what a matrix writes nor what the stream gains; name resid_pre or resid_post"
    return odd


def _reader(activation: Tensor, writes: list[_Write]) -> int | None:
    """The number of the matrix that reads an activation; None where there is no such matrix."""
    flat = activation.flatten(0, -2)
    return next((number for number, write in enumerate(writes) if _same(flat, write.read)), None)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and _is_sum(one, other)


def _is_sum(total: Tensor, *parts: Tensor) -> bool:
    """Whether a vector is the sum of others: up to the root of its type's precision in the least, as all must count."""
    eps = torch.finfo(total.dtype).eps
    sizes = [part.float().norm() for part in parts]
    error = (total.float() - sum(part.float() for part in parts)).norm()
    return bool(error <= eps**0.5 * min(sizes) + 8 * eps * max(sizes))
