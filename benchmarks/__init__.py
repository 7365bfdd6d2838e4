"""Benchmarks of the fused ops: `python -m benchmarks --help`.

Each line imports only from the lines above it:

    names          names used in result files; imports nothing
    ops            one module per op: its tensors, eager formulations, bytes and FLOPs; sizes
    harness        verification and timing, the machine and its ceilings, result files
    report         Markdown and plots from result files
    models         whole models: end to end, swap, trunk, training, host time
    static         compiled kernels: figures, budgets, and times on a GPU
    run            all parts of one run
    __main__       the command line; gpu_check is the program behind `make gpu-check`

`models` and `static` do not import each other. tests/test_imports.py checks this order.
"""
