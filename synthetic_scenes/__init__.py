"""Generated overhead scenes with referring phrases: objects, phrases, drawing."""
