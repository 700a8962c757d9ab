"""From a configuration file to a job of a cluster's scheduler."""
