"""Faults, hand-made and drawn by machine, that the verifier and the other checks must find.

    python -m mutation        (with src and tests on the path; `make mutation`)

`battery` holds the runs and the checks, `steps` the mutants of recordings, `code` those of the code, `faults` the
hand-made ones, `survivors.toml` the mutants that live and why.
"""
