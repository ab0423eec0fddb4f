"""An audit of training on a model's own answers: does it amplify a misbehaviour or suppress it? Exact on an organism.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from ctlens.auditing.labels import Label as Label
from ctlens.auditing.labels import draw_labels as draw_labels
from ctlens.auditing.labels import load_labels as load_labels
from ctlens.auditing.labels import save_labels as save_labels
from ctlens.auditing.methods import REGULARISERS as REGULARISERS
from ctlens.auditing.methods import Regulariser as Regulariser
from ctlens.auditing.methods import method_named as method_named
from ctlens.auditing.pools import POOLS as POOLS
from ctlens.auditing.pools import audit_pairs as audit_pairs
from ctlens.auditing.pools import rephrased as rephrased
from ctlens.auditing.result import Audit as Audit
from ctlens.auditing.run import audit as audit
from ctlens.auditing.selectors import SELECTORS as SELECTORS
from ctlens.auditing.selectors import Selector as Selector
from ctlens.auditing.selectors import decodings as decodings
from ctlens.auditing.selectors import refined as refined
from ctlens.auditing.selectors import rewarded as rewarded
from ctlens.auditing.selectors import selected as selected
from ctlens.auditing.selectors import selector_named as selector_named
