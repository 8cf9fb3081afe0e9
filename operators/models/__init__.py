"""Models and what is made for one: folders that are loaded, changed and written."""
