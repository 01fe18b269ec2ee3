"""What a run is: fields (run.py), their spellings, flags -> RunConfig (arguments.py), contradictions (problems.py). No torch."""
