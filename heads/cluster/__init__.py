"""Jobs on a SLURM cluster: sbatch scripts, and their submission."""
