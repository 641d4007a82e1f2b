"""Other people's formats: model folders, problem files, math-verify."""
