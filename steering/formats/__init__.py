"""Files of others, read and written without pickle: GGUF control vectors, pyreft, PEFT, SAELens and Gemma Scope."""
