"""``kl-plugins list``: prints the words of a spec, the presets and the hosts."""

from __future__ import annotations

from typing import Any

from kl_plugins.cli.output import Page, fail, print_json
from kl_plugins.estimators import all_estimators
from kl_plugins.explain.options import PLACEMENT_MEANINGS
from kl_plugins.hosts import discover_hosts
from kl_plugins.spec import PRESETS, KLSpec
from kl_plugins.spec.options import OPTIONS
from kl_plugins.spec.presets import NOTES
from kl_plugins.spec.schedules import SCHEDULES


def list_command(as_json: bool) -> int:
    """Print every word that a KL spec can contain, and every host.

    Args:
        as_json: whether to print JSON instead of text.

    Returns:
        The exit status: 0, or 1 if a third-party package of estimators is broken.
    """
    try:
        catalogue = build_catalogue()
    except RuntimeError as error:
        return fail(f"kl-plugins: {error}", as_json, 1)
    if as_json:
        return print_json(catalogue)
    _print(catalogue)
    return 0


def build_catalogue() -> dict[str, list[dict[str, Any]]]:
    """Collect all that ``kl-plugins list`` prints.

    Returns:
        The rows of each section as plain data, by name of the section.

    Raises:
        RuntimeError: A third-party package of estimators is broken.
    """
    rows = [
        {
            "name": row.name,
            "value": row.value_formula,
            "coefficient": row.coefficient_formula,
            "kind": row.kind,
            "source": row.source,
        }
        for row in all_estimators()
    ]
    rows.append(
        {
            "name": "alpha-<a>",
            "value": "(delta^a - a delta + a - 1)/(a (a-1))",
            "coefficient": "(1 - delta^a)/a",
            "kind": "other_f",
            "source": "arXiv 2601.10201, Theorem 4.1",
        }
    )
    registry = discover_hosts()
    return {
        "estimators": rows,
        "placements": [{"name": name, "meaning": meaning} for name, meaning in PLACEMENT_MEANINGS.items()],
        "presets": [
            {"name": name, "spec": spec, "target": KLSpec.parse(spec).target, "note": NOTES[name]}
            for name, spec in PRESETS.items()
        ],
        "corrections": [{"name": name, "meaning": meaning} for name, meaning in OPTIONS["is"].values.meanings.items()],
        "options": [{"name": row.name, "value": row.values.form, "meaning": row.meaning} for row in OPTIONS.values()],
        "beta": [{"name": row.kind, "value": row.form, "meaning": row.meaning} for row in SCHEDULES.values()],
        "hosts": [
            *(
                {
                    "name": name,
                    "installed": host.installed_version(),
                    "supported": host.supported,
                    "tested": list(host.tested),
                    "keys": dict(host.keys),
                    "error": None,
                }
                for name, host in registry.hosts.items()
            ),
            *(
                {"name": host.name, "installed": None, "supported": "", "tested": [], "keys": {}, "error": str(host)}
                for host in registry.broken
            ),
        ],
    }


def _print(catalogue: dict[str, list[dict[str, Any]]]) -> None:
    page = Page()
    page.title("<estimator>@<placement>[/<option>[:<value>]]..., or a preset")
    page.section(
        "Estimators (u = log policy - log reference, delta = exp(-u))",
        (
            (e["name"], f"value {e['value']}; coefficient {e['coefficient']}; {e['kind']}")
            for e in catalogue["estimators"]
        ),
    )
    page.section("Placements", ((f"@{p['name']}", p["meaning"]) for p in catalogue["placements"]))
    page.section("Presets", ((p["name"], f"{p['spec']}: {p['note']}") for p in catalogue["presets"]))
    page.section("Corrections", ((f"is:{c['name']}", c["meaning"]) for c in catalogue["corrections"]))
    page.section(
        "Options",
        ((o["name"], f"{o['value'] and o['value'] + ': '}{o['meaning']}") for o in catalogue["options"]),
    )
    page.section("Beta schedules", ((b["name"], f"{b['value']}: {b['meaning']}") for b in catalogue["beta"]))
    page.section("Hosts", ((h["name"], _host_line(h)) for h in catalogue["hosts"]))
    page.paragraph("kl-plugins explain SPEC says which gradient a spec estimates.")


def _host_line(host: dict[str, Any]) -> str:
    if host["error"]:
        return f"cannot be loaded: {host['error']}"
    installed = f"{host['installed']} installed" if host["installed"] else "not installed"
    return f"{installed}; supported {host['supported']}; tested {', '.join(host['tested'])}"
