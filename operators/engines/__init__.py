"""What generates tokens behind `serve`, one file per engine."""
