"""One contract for all hosts: the table of situations, what is checked in each, and what a host's driver has to offer.

``table.py`` is the specification, ``checks.py`` runs its rows, and ``driver.py`` says what each host gives them. Every
host runs the rows in its own ``tests/<host>/test_contract.py``. ``docs/faults.md`` is generated from the table by
``python -m tests.contract.document``.
"""
