"""`w2s run`: several stages in order, over seeds where wanted, one MLflow run above them, one report at the end."""
