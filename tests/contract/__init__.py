"""The contract that all hosts fulfil: what users see in each situation, with one check per situation.

``table.py`` lists the situations, ``checks.py`` checks them, and ``driver.py`` defines the interface through which the
checks use a host. Each host runs all rows in its own ``tests/<host>/test_contract.py``. The command
``python -m tests.contract.document`` generates ``docs/faults.md`` from the table.
"""
