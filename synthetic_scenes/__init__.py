"""Generated overhead scenes with referring phrases: objects and their predicates, phrases, drawing, scenes on disk."""
