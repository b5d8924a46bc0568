"""The contract: tensors, steps and arithmetic of a packed region. Knows no device."""
