"""Where images lie, behind dataset.py: files, shards and shapes made on the fly."""
