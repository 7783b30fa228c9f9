"""`compare-algorithms`: estimators compared over seeds."""
