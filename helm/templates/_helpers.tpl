{{- define "lowbit.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "lowbit.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "lowbit.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "lowbit.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.selectorLabels" -}}
app.kubernetes.io/name: {{ include "lowbit.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "lowbit.labels" -}}
{{ include "lowbit.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lowbit.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "lowbit.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "lowbit.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- $variant := ternary "gpu" "cpu" (gt (int .Values.gpu.count) 0) -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s-%s" .Chart.AppVersion $variant) .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The arguments of the image's entry point, `lowbit`. */}}
{{- define "lowbit.arguments" -}}
- serve
- /checkpoint
- --host=0.0.0.0
- --port=8000
- --drain-timeout-s={{ int .Values.server.drainTimeoutS }}
- --tensor-parallel-size={{ max 1 (int .Values.gpu.count) }}
{{- with .Values.server.servedModelName }}
- {{ printf "--served-model-name=%s" . | quote }}
{{- end }}
{{- with .Values.server.maxModelLen }}
- --max-model-len={{ int . }}
{{- end }}
{{- with .Values.server.kvCacheGib }}
- --kv-cache-gib={{ . }}
{{- end }}
{{- end -}}

{{/* What one value alone cannot show: sums and pairs. */}}
{{- define "lowbit.check" -}}
{{- if eq .Values.image.tag "latest" -}}
{{- fail "image.tag is latest, which names another image tomorrow; give a version, or set image.digest" -}}
{{- end -}}
{{- $preStop := int .Values.shutdown.preStopS -}}
{{- $drain := int .Values.server.drainTimeoutS -}}
{{- $grace := int .Values.shutdown.terminationGracePeriodS -}}
{{- if le $grace (add $preStop $drain | int) -}}
{{- fail (printf "shutdown.terminationGracePeriodS is %d and must exceed shutdown.preStopS %d + server.drainTimeoutS %d = %d: Kubernetes would kill requests that are still being answered; set at least %d" $grace $preStop $drain (add $preStop $drain) (add $preStop $drain 10)) -}}
{{- end -}}
{{- if and (eq (toString .Values.rollout.maxSurge | trimSuffix "%") "0") (eq (toString .Values.rollout.maxUnavailable | trimSuffix "%") "0") -}}
{{- fail "rollout.maxSurge and rollout.maxUnavailable are both 0: no pod could ever be replaced; set one of them to 1" -}}
{{- end -}}
{{- end -}}
