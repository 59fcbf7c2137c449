"""Models: settings, catalogue, opening, loading, and the generated tiny family."""
