"""The tests, laid out as the product is: a folder a package, kit/ for what they share, chaos/ for faults, fuzz/ for
hostile messages, docs/ for what documents and repository promise; conftest.py has the fixtures.

kit/ schema/ transport/ queue/ ledger/ migrations/ read/ cli/ local/ docs/ chaos/ fuzz/
"""
