"""N LoRA trials on one resident frozen base. No ray in here."""
