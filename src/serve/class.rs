//! The two classes of requests, and one value for each.

use std::ops::{Index, IndexMut};

use crate::request::Priority;

/// One value a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PerClass<T> {
    pub interactive: T,
    pub background: T,
}

impl<T> PerClass<T> {
    /// Makes each class's value from its name, which is its value of the label `class`.
    pub fn new(mut make: impl FnMut(&'static str) -> T) -> Self {
        Self { interactive: make("interactive"), background: make("background") }
    }
}

impl<T> Index<Priority> for PerClass<T> {
    type Output = T;

    fn index(&self, priority: Priority) -> &T {
        match priority {
            Priority::Interactive => &self.interactive,
            Priority::Background => &self.background,
        }
    }
}

impl<T> IndexMut<Priority> for PerClass<T> {
    fn index_mut(&mut self, priority: Priority) -> &mut T {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Background => &mut self.background,
        }
    }
}
