"""Load and freeze the base model; the policy that objectives see."""
