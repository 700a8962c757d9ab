# Sourced by the job before Python starts: the modules of TSUBAME 3. `module avail` lists a cluster's.
module load cuda cudnn nccl openmpi
