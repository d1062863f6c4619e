"""Who owns a run folder, and ranks that stall or die."""
