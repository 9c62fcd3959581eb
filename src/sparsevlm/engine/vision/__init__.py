"""The vision tower as a captured program, and which patches it leaves out."""
