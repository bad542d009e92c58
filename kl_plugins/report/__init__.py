"""What the log of a run says about its KL: readers, rules, and one self-contained HTML page.

:func:`~kl_plugins.report.reading.read_runs` reads logs, :func:`~kl_plugins.report.findings.find` says in words what is
in them, and :func:`~kl_plugins.report.page.render` makes the page. Nothing here imports torch or a framework.
"""
