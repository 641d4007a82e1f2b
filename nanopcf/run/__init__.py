"""What a run needs around its loop: folder, log, signals, machine, stages. Open it to change how runs are kept, not what they compute."""
