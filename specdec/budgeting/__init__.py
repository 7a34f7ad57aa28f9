"""What the budget has learned: pass times and what drafts earned."""
