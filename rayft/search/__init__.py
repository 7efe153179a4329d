"""What a sweep tries next. Ray in one file only: `searcher.py`, which Ray Tune asks."""
