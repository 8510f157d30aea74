"""What the patch does on the user's own machine: `python3 -m prefill_patch trial`."""
