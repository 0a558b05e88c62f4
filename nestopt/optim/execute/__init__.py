"""How parameters are stepped: executors, which differ in how they gather tensors and in nothing else."""
