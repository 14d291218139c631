//! HTTP: JSON types, handlers, layers in one list, the one status table.
