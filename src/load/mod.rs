//! The load generator behind `eremois bench`. Uses no other room: it drives any server.
