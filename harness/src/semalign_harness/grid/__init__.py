"""Many experiments, in processes or on Slurm."""
