#!/usr/bin/busybox sh
# The first program of a virtual machine: makes of a bare kernel what a host is, and runs suites.
# The console is for the kernel, the second serial line for the suites and their exit codes.
export PATH=/usr/sbin:/usr/bin:/applets
/usr/bin/busybox mkdir -p /applets
/usr/bin/busybox --install -s /applets

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
exec < /dev/null > /dev/ttyS1 2>&1
stty -onlcr < /dev/ttyS1
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
mount -t bpf bpffs /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for module in $(cat /modules); do
    modprobe -q "$module"
done
ip link set lo up

echo "netdp-vm kernel $(uname -r)"
# shellcheck disable=SC2046 # one word each
export NETDP_BIN=/netdp $(cat /suites/environment)
while read -r suite arguments; do
    echo "netdp-vm suite $suite"
    # shellcheck disable=SC2086 # words are what they are
    NETDP_TEST_SKIP="/suites/$suite.skip" "/suites/$suite" --color never $arguments < /dev/null
    echo "netdp-vm exit $suite $?"
done < /suites/list
# QEMU is told to end where others would start again.
reboot -f
