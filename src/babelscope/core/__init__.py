"""What every stage shares and what cannot change a result: errors, logging, files, resuming. No torch, no numpy."""
