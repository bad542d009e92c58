"""Tables of the words that a spec can contain, and of the metrics."""

from __future__ import annotations

from kl_plugins.cli.listing import build_catalogue
from kl_plugins.explain.options import markdown_table
from kl_plugins.metric_names import AGE, OBSERVATION
from kl_plugins.metrics import MEANINGS, REDUCTIONS
from kl_plugins.spec.target import TARGETS
from tests.pages.parts import table

KINDS = {
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "other_f": "another f-divergence",
    "none": "none",
}
JOINED = {"mean": "mean over tokens", "max": "maximum", "pooled": "computed again from joined sums"}


def estimators() -> str:
    """Return a table with value, coefficient, divergence and source of each estimator that ships with kl-plugins."""
    rows = [
        (_code(row["name"]), _code(row["value"]), _code(row["coefficient"]), KINDS[row["kind"]], row["source"])
        for row in build_catalogue()["estimators"]
    ]
    return table(("estimator", "value", "coefficient", "as a loss, the gradient of", "source"), rows)


def _code(text: str) -> str:
    # Inside backticks an escaped bar would be shown with its backslash, so text with a bar becomes an HTML element.
    return f"<code>{text.replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def placements() -> str:
    """Return a table of the three placements."""
    rows = [(f"`@{row['name']}`", row["meaning"]) for row in build_catalogue()["placements"]]
    return table(("placement", "meaning"), rows)


def options() -> str:
    """Return a table of the options, in the order of the canonical text of a spec."""
    return markdown_table()


def corrections() -> str:
    """Return a table of the values of ``is:``."""
    rows = [(f"`is:{row['name']}`", row["meaning"]) for row in build_catalogue()["corrections"]]
    return table(("weight", "meaning"), rows)


def schedules() -> str:
    """Return a table of the values of ``beta:``."""
    rows = [(f"`beta:{row['value']}`", row["meaning"]) for row in build_catalogue()["beta"]]
    return table(("control of beta", "meaning"), rows)


def presets() -> str:
    """Return a table of the presets, with their specs and targets."""
    rows = [
        (f"`{row['name']}`", f"`{row['spec']}`", f"`{row['target']}`", row["note"])
        for row in build_catalogue()["presets"]
    ]
    return table(("preset", "spec", "target", "where it comes from"), rows)


def targets() -> str:
    """Return a table of all targets."""
    return table(("target", "meaning"), [(f"`{name}`", meaning) for name, meaning in TARGETS.items()])


def metrics() -> str:
    """Return a table of all metrics, whose names begin with ``kl/``."""
    rows = [(f"`{key}`", MEANINGS[key], JOINED[how]) for key, how in REDUCTIONS.items()]
    rows.append(("`kl/beta`", "the coefficient that was applied", "mean over micro-batches"))
    joined = {
        "kl/age/mean": "mean over responses",
        "kl/age/max": JOINED["max"],
        "kl/observed": "mean over micro-batches",
    }
    further = {**AGE, **OBSERVATION}
    rows += [(f"`{key}`", said, joined.get(key, JOINED["pooled"])) for key, said in further.items()]
    return table(("metric", "meaning", "over micro-batches, ranks and the logging window"), rows)
