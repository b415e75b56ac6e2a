//! A value that is replaced as a whole: readers take no lock, and writers hold none while they make
//! the next one.

use std::convert::Infallible;
use std::sync::Arc;

use arc_swap::ArcSwap;

/// A value that threads read as it stood at one moment.
#[derive(Debug)]
pub(super) struct Snapshot<T> {
    present: ArcSwap<T>,
}

impl<T> Snapshot<T> {
    pub(super) fn new(value: T) -> Self {
        Self {
            present: ArcSwap::from_pointee(value),
        }
    }

    /// The value as it stands. Lock-free.
    pub(super) fn load(&self) -> Arc<T> {
        self.present.load_full()
    }

    /// Puts what `change` makes of the value in its place, and gives what `change` returns beside
    /// it. Runs `change` again if another thread has replaced the value meanwhile.
    pub(super) fn update<R>(&self, mut change: impl FnMut(&T) -> (T, R)) -> R {
        match self.try_update(|value| Ok::<_, Infallible>(change(value))) {
            Ok(result) => result,
            Err(never) => match never {},
        }
    }

    /// As `update`; nothing changes if `change` fails.
    pub(super) fn try_update<R, E>(
        &self,
        mut change: impl FnMut(&T) -> Result<(T, R), E>,
    ) -> Result<R, E> {
        loop {
            let before = self.present.load_full();
            let (after, result) = change(&before)?;
            let found = self.present.compare_and_swap(&before, Arc::new(after));
            if Arc::ptr_eq(&found, &before) {
                return Ok(result);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_change_of_concurrent_writers_is_lost() {
        const EACH: usize = 1000;
        let list = Snapshot::new(Vec::new());
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let list = &list;
                scope.spawn(move || {
                    for number in 0..EACH {
                        list.update(|values| {
                            let mut values = values.clone();
                            values.push((writer, number));
                            (values, ())
                        });
                    }
                });
            }
        });
        let values = list.load();
        assert_eq!(values.len(), 4 * EACH);
        for writer in 0..4 {
            let own: Vec<_> = values.iter().filter(|value| value.0 == writer).collect();
            assert!(own.windows(2).all(|two| two[0].1 < two[1].1));
        }
        let failed = list.try_update(|_| Err::<(Vec<_>, ()), _>("no"));
        assert_eq!(failed, Err("no"));
        assert_eq!(list.load().len(), 4 * EACH);
    }
}
