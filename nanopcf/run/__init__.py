"""What a run needs around its loop. Open it to change how runs are started, stored or stopped, not what they compute.

config          the settings of every command, from flags and TOML
folder          run folders: one run each, locked, with its metrics and checkpoints
files           files that are written completely or not at all
log             what a run prints while it works
signals         Ctrl-C and SIGTERM: save, then end
machine         device, dtype, threads and memory
parallel        one run on several processes
stages          the cached stages of pipeline.py, and its worker processes
cuda_graphs     decoding steps recorded once and replayed, on CUDA
counted_random  random numbers as a function of (seed, row, position)
"""
