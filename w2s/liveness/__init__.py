"""Who owns a run folder, and ranks that stand still or die."""
