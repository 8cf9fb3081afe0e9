"""What a teacher says, and how a student hears of it."""
