"""What `train.py` is made of. Each file does one job and can be taken alone."""
