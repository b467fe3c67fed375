"""Any Hugging Face decoder: its taps, its states, its Jacobians. Hooks and transformers live here."""
