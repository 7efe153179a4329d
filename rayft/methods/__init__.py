"""What is trainable: one technique per file. `build` maps a spec of the menu to its
implementation."""
