"""Where a sweep's trials run: packs and runs of their own as Ray actors, and who gives places."""
