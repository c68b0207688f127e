//! Things whose calls block: the backend (verifier, hundreds of thousands of map entries), the store
//! (fsync), port reservations (65,535 binds).
//!
//! Owns keeping them off the runtime's worker threads. Knows nothing of what they do.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use tokio::task::spawn_blocking;

/// Something that is called on threads made for blocking, one call at a time.
pub(super) struct Blocking<T>(Arc<Mutex<T>>);

impl<T: Send + 'static> Blocking<T> {
    pub(super) fn new(inner: T) -> Self {
        Self(Arc::new(Mutex::new(inner)))
    }

    /// Runs `work` to its end, even if the caller loses interest.
    pub(super) async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut T) -> R + Send + 'static,
    ) -> Result<R> {
        let inner = Arc::clone(&self.0);
        // After a panic the next level-triggered call puts right what was left half done.
        spawn_blocking(move || work(&mut inner.lock().unwrap_or_else(PoisonError::into_inner)))
            .await
            .context("finish a blocking call")
    }
}
