"""The ops: tensors, published and best eager formulation, bytes and FLOPs; one module per op, of the op's name."""
