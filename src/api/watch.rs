//! Something kept that is looked at until it is another than the one that was told: what streams of events stand on.

use std::time::Duration;

use crate::Result;

/// What is told is known by its state, of type `S`.
pub struct Watch<T, S> {
    /// Read and not told yet.
    next: Option<T>,
    told: Option<S>,
    pause: Duration,
    /// Between two looks: at first, and at most. It doubles.
    first_look: Duration,
    last_look: Duration,
}

impl<T, S: PartialEq> Watch<T, S> {
    /// `first` was read already, and is told first.
    pub fn new(first: T, first_look: Duration, last_look: Duration) -> Self {
        Self { next: Some(first), told: None, pause: first_look, first_look, last_look }
    }

    /// The next one whose state is another; `None` when `look` finds it gone. A store that is away is asked again.
    pub async fn changed<F>(&mut self, look: impl Fn() -> F, state: impl Fn(&T) -> S) -> Option<T>
    where
        F: Future<Output = Result<Option<T>>>,
    {
        loop {
            let found = match self.next.take() {
                Some(found) => found,
                None => {
                    tokio::time::sleep(self.pause).await;
                    self.pause = (self.pause * 2).min(self.last_look);
                    match look().await {
                        Ok(found) => found?,
                        Err(_) => continue,
                    }
                }
            };
            let state = state(&found);
            if self.told.as_ref() != Some(&state) {
                self.told = Some(state);
                self.pause = self.first_look;
                return Some(found);
            }
        }
    }
}
