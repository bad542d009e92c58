"""The list of all generated parts of the documentation, with their pages."""

from __future__ import annotations

from functools import partial

from tests.pages import configs, migration, refusals, reports, words
from tests.pages.parts import Part

HOSTS = ("trl", "verl", "openrlhf")

PARTS = (
    *(
        Part("specs.md", function.__name__, function)
        for function in (
            words.estimators,
            words.placements,
            words.options,
            words.corrections,
            words.schedules,
            words.presets,
            words.targets,
        )
    ),
    *(Part("migration.md", host, partial(migration.part, host)) for host in HOSTS),
    Part("migration.md", "beta", migration.beta_part),
    *(
        Part(f"hosts/{host}.md", f"{when} refusals", partial(refusals.host_part, host, when))
        for host in HOSTS
        for when in ("early", "late")
    ),
    Part("hosts/compatibility.md", "shared refusals", refusals.shared_part),
    Part("glossary.md", "metrics", words.metrics),
    Part("report.md", "rules", reports.rules),
    Part("report.md", "native", reports.native),
    Part("explain-config.md", "trl example", partial(configs.listing, "trl", "grpo.yaml")),
    Part("explain-config.md", "verl example", partial(configs.listing, "verl", "grpo.sh", "--suggest")),
    Part("explain-config.md", "openrlhf example", partial(configs.listing, "openrlhf", "ppo.sh")),
    Part("explain-config.md", "common rules", partial(configs.rules_part, "")),
    *(Part("explain-config.md", f"{host} rules", partial(configs.rules_part, host)) for host in HOSTS),
)
