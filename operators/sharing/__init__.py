"""Work that several workers share, and what they hear of their machines."""
