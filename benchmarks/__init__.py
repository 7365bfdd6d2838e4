"""Benchmarks of the fused ops: `python -m benchmarks --help`.

Each line imports what stands above it alone:

    names          names that stand in results; imports nothing
    ops            one module per op: its tensors, its eager formulations, its bytes and FLOPs; sizes
    harness        checking and timing, the machine and its ceilings, result files
    report         Markdown and plots from results alone
    models         whole models: end to end, swap, trunk, training, host time
    static         compiled kernels: figures, budgets, and their times on a GPU
    run            all parts of one run
    __main__       the command line; gpu_check, what `make gpu-check` runs

`models` and `static` do not import each other. tests/test_imports.py holds this order.
"""
